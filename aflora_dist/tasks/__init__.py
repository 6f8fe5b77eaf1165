"""What is trained on: data, model, loss and metrics. Knows no engine and no method.

Other rooms use `base` (what the loop asks of a task), the tasks in `classification` and `sft`, and of what these are
made `batches`, `data`, `dtypes`, `glue`, `limits` and `model`: each by its own name, for most import transformers,
which the command line's help has no need of. The rest is this room's own.
"""
