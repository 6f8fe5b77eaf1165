"""A trained adapter for servers that do not know this package: as plain LoRA, or merged into its model's weights."""
