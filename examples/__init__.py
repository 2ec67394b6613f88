"""Short programs that show EDM at work. Run each under mpirun, as its docstring says."""
