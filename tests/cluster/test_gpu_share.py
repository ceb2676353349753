"""What an actor asks Ray for on CPU-only, small and large clusters."""

import pytest

from cluster.errors import StartError
from cluster.gpu_share import compute_gpu_share


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_actors", "expected"),
    [
        ("cpu", 8, 5, 0.0),
        ("auto", 0, 5, 0.0),
        ("auto", 5, 5, 1.0),
        ("cuda", 40, 33, 1.0),
        ("cuda", 1, 5, 0.2),
        ("auto", 2, 5, 0.3333),
    ],
)
def test_cards_are_shared_out(device, num_gpus: float, num_actors: int, expected: float) -> None:
    share = compute_gpu_share(device, num_gpus, num_actors)
    assert share == expected
    # All of them can be placed at once.
    assert share == 0 or sum(int(1 / share + 1e-9) for _ in range(int(num_gpus))) >= num_actors


def test_cuda_without_a_card_is_refused() -> None:
    with pytest.raises(StartError, match="no node of this Ray cluster has a GPU"):
        compute_gpu_share("cuda", 0, 5)
