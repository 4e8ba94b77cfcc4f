"""Pure functions: the mathematics of the methods, free of models, loops and configs."""
