"""The geometric median: the point with the smallest sum of distances to the rows."""

from jaxtyping import Float
from torch import Tensor


def geometric_median(rows: Float[Tensor, "n d"], iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """Weiszfeld's iteration in float64 from the mean, until a step is below ``tolerance`` of the mean distance.

    As in the paper's training code and dictionary_learning. A row that the iterate hits counts at a distance of 1e-12.
    """
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(iterations):
        distance = (rows - point).norm(dim=1).clamp_min(1e-12)
        weight = 1 / distance
        step = (weight @ rows) / weight.sum() - point
        point = point + step
        if float(step.norm()) <= tolerance * float(distance.mean()):
            break
    return point.float()
