"""What a profiler's traces say about steps, ranges, communication and ranks. Needs no torch.

`read_run` reads a run's windows, `tables` lays them side by side.
"""

from .analysis import RankReport, WindowReport
from .reader import TraceError
from .run import read_run
from .tables import Table, range_paths, short_name, tables

__all__ = ["RankReport", "Table", "TraceError", "WindowReport", "range_paths", "read_run", "short_name", "tables"]
