"""What is trained on: data, head, loss and metrics. Knows no engine and no method."""
