"""The peer: PyTorch's DistributedDataParallel over gloo, in the memory layout in which it is faster."""

import rank_side
import torch
from torch import distributed, nn


class SamePadding(nn.ConstantPad3d):
    """Keras' "same": where the padding is odd, the one voxel more is at the end."""

    def __init__(self, width: int):
        super().__init__(((width - 1) // 2, width // 2) * 3, 0.0)


def network(size: int | list[int], outputs: int = 3) -> nn.Module:
    """`rank_side.network`, layer by layer."""
    if isinstance(size, list):
        pairs = zip([size[0], *size], size, strict=False)
        return nn.Sequential(*[layer for widths in pairs for layer in (nn.Linear(*widths), nn.ReLU())])

    def convolution(before: int, after: int, width: int) -> list[nn.Module]:
        # An odd kernel pads by itself, which is faster.
        pad = [] if width % 2 else [SamePadding(width)]
        return [*pad, nn.Conv3d(before, after, width, padding=width // 2 if width % 2 else 0), nn.LeakyReLU(0.2)]

    layers: list[nn.Module] = []
    before, channels = 1, 16
    while size > 4:
        layers += [*convolution(before, channels, 3), nn.AvgPool3d(2)]
        size, before, channels = size // 2, channels, channels * 2
    layers += convolution(before, channels, 3)
    before, channels = channels, channels // 2
    layers += [*convolution(before, channels, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    layers += [nn.Linear(channels, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)]
    return nn.Sequential(*layers)


def prepare(ways: list[str], size: int | list[int], batch: int) -> None:
    """Make the one step "torch", of `nn.parallel.DistributedDataParallel`."""
    rank, addresses = rank_side.addresses()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://{addresses[0]}", rank=rank, world_size=len(addresses))
    torch.manual_seed(rank)
    model = network(size)
    if isinstance(size, list):
        x = torch.randn(batch, size[0])
    else:
        layout = {"memory_format": torch.channels_last_3d}
        model, x = model.to(**layout), torch.randn(batch, 1, size, size, size).to(**layout)
    y = torch.randn(model(x).shape)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    rank_side.steps["torch"] = step
