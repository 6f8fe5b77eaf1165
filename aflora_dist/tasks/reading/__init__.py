"""Files of examples: the one place where CSV, TSV, JSON (lines) and parquet are read and checked.

What comes out is what the file holds: cells of CSV and TSV are text, JSON and parquet have types of their own. Nothing
is guessed from values, no row is left out, and what cannot be read is an error that names the line.
"""

from .delimited import Row, is_plain, plain_header, plain_rows, read_columns
from .json_values import as_json_column, as_usual, exact
from .lines import LINE, listed, shown
from .table import FILES, Rows, read_table
from .whole import whole_rows

__all__ = [
    "FILES",
    "LINE",
    "Row",
    "Rows",
    "as_json_column",
    "as_usual",
    "exact",
    "is_plain",
    "listed",
    "plain_header",
    "plain_rows",
    "read_columns",
    "read_table",
    "shown",
    "whole_rows",
]
