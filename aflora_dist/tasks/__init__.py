"""What is trained on: data, model, loss and metrics. Knows no engine and no method."""
