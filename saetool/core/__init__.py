"""Pure functions and one module class: no paths, no printing, no clocks, explicit generators."""
