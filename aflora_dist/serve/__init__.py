"""A trained adapter for servers that do not know this package: as plain LoRA, or merged into its model's weights.

For others: `lora.to_lora` and `merge.merge`, and their command lines, `main.main`.
"""
