"""Tasks: conversations to train on, and to be judged by."""
