"""How redundant a sublayer is: the formulas, their running sums, and the hooks that feed them."""
