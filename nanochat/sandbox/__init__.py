"""Model code, run in a process that can do little; door: nanochat.execution. Imports the standard library only."""
