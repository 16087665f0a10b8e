"""What inputs.py is made of: record files, the order they are read in, their mistakes and their audit."""
