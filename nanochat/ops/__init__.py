"""Tensor operations, one to a file, each in the form that is fastest on the hardware at hand."""
