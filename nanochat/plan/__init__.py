"""What hours buy on a machine: memory, time and quality of a run before it starts."""
