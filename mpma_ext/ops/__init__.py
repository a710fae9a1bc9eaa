"""The public operators: checks, choice of backend, and the rules that PyTorch needs to know."""
