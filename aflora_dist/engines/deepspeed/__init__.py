"""DeepSpeed's ZeRO: the only folder that names its private interfaces."""
