"""What a run will train, freeze and hold, computed beforehand: without weights, without a GPU, without an engine.

For others: the command, `command.main` and `command.dry_run`; `plan.make_plan` and its `launches.Launch`.
"""
