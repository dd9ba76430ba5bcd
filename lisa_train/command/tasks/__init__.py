"""What a run trains on, one file a task: the model, the data, and the trainer for both."""
