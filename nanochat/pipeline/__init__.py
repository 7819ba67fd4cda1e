"""Everything in one command, stage by stage. Imports no torch: the free notebooks start with `pipeline.session`."""
