"""`aflora train`: AFLoRA fine-tuning of a text classifier from the command line."""
