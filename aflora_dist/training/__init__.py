"""The main job: AFLoRA fine-tuning of a text classifier from the command line."""
