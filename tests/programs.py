"""What a traced program consists of."""

import jax


def products_of(jaxpr):
    """All products of matrices in a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products_of(getattr(inner, "jaxpr", inner))
