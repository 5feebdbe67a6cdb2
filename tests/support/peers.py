"""What other people call CBAM, written anew with the parameters and arithmetic that theirs have.

The facts are from the implementations that each docstring names; the initial weights are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def average_and_maximum(x: Tensor) -> Tensor:
    return torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)


def maximum_and_average(x: Tensor) -> Tensor:
    return average_and_maximum(x).flip(1)


# ------------------------------------------------------------------------ Jongchan/attention-module


class AuthorsChannelGate(nn.Module):
    def __init__(self, channels: int, reduction: int, pool_types: tuple[str, ...]) -> None:
        super().__init__()
        hidden = channels // reduction
        self.pool_types = pool_types
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        pooled = {
            "avg": lambda: F.avg_pool2d(x, size),
            "max": lambda: F.max_pool2d(x, size),
            "lp": lambda: F.lp_pool2d(x, 2, size),
            "lse": lambda: x.flatten(2).logsumexp(2)[..., None, None],
        }
        total = sum(self.mlp(pooled[kind]()) for kind in self.pool_types)
        return x * torch.sigmoid(total)[..., None, None].expand_as(x)


class AuthorsConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AuthorsSpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = AuthorsConv()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.spatial(maximum_and_average(x)))


class AuthorsCBAM(nn.Module):
    """Linear layers with biases, the maximum first, BatchNorm."""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        pool_types: tuple[str, ...] = ("avg", "max"),
        no_spatial: bool = False,
    ) -> None:
        super().__init__()
        self.ChannelGate = AuthorsChannelGate(channels, reduction, pool_types)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = AuthorsSpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ChannelGate(x)
        return x if self.no_spatial else self.SpatialGate(x)


class AuthorsBlock(nn.Module):
    """A residual block that calls the whole of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.cbam = AuthorsCBAM(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.cbam(self.bn(self.conv(x))) + x)


# ------------------------------------------------------------------------------ luuuyi/CBAM.PyTorch


class LuuuyiChannel(nn.Module):
    """1x1 convolutions without biases; returns the gate."""

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or channels // 16
        self.avg_pool, self.max_pool = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc(self.avg_pool(x)) + self.fc(self.max_pool(x)))


class LuuuyiOlderChannel(nn.Module):
    """The same with other names."""

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or channels // 16
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def mlp(pooled: Tensor) -> Tensor:
            return self.fc2(self.relu1(self.fc1(pooled)))

        average, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return torch.sigmoid(mlp(average) + mlp(maximum))


class LuuuyiSpatial(nn.Module):
    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.conv1(average_and_maximum(x)))


class LuuuyiBlock(nn.Module):
    """A residual block that multiplies the gates itself."""

    def __init__(
        self, channels: int, channel: type[nn.Module] = LuuuyiChannel, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.ca = channel(channels)
        self.sa = LuuuyiSpatial()
        self.downsample = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.bn1(self.conv1(x))
        out = self.ca(out) * out
        out = self.sa(out) * out
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class LuuuyiWhole(nn.Module):
    """The two gates in a module of their own."""

    def __init__(self, channels: int, channel: type[nn.Module] = LuuuyiChannel) -> None:
        super().__init__()
        self.ca, self.sa = channel(channels), LuuuyiSpatial()

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.ca(x)
        return x * self.sa(x)


# ------------------------------------------------------------------------------- open-mmlab/mmyolo


class ConvModule(nn.Module):
    """mmcv's: a convolution and an activation."""

    def __init__(self, conv: nn.Conv2d, activate: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.activate = conv, activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.activate is None else self.activate(x)


class MmyoloChannel(nn.Module):
    def __init__(self, channels: int, reduction: int, activation: nn.Module) -> None:
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            ConvModule(nn.Conv2d(channels, hidden, 1), activation),
            ConvModule(nn.Conv2d(hidden, channels, 1), None),
        )

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return torch.sigmoid(self.fc(average) + self.fc(maximum))


class MmyoloSpatial(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)
        self.conv = ConvModule(conv, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(average_and_maximum(x))


class MmyoloCBAM(nn.Module):
    """Biases everywhere."""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        activation = nn.ReLU() if activation is None else activation
        self.channel_attention = MmyoloChannel(channels, reduction, activation)
        self.spatial_attention = MmyoloSpatial(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        out = self.channel_attention(x) * x
        return self.spatial_attention(out) * out


# -------------------------------------------------- those that add their input; and a row of pixels


class ExternalChannel(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = channels // reduction
        self.se = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return torch.sigmoid(self.se(maximum) + self.se(average))


class ExternalSpatial(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(maximum_and_average(x)))


class ExternalCBAMBlock(nn.Module):
    """xmu-xiaoma666/External-Attention-pytorch: the maximum first, a large kernel, x + CBAM(x)."""

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 49) -> None:
        super().__init__()
        self.ca, self.sa = ExternalChannel(channels, reduction), ExternalSpatial(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.ca(x)
        return x + out * self.sa(out)


class PeachyChannel(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = channels // reduction
        self.linear = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.linear(x.amax((2, 3))) + self.linear(x.mean((2, 3)))
        return torch.sigmoid(gate)[..., None, None] * x


class PeachySpatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(maximum_and_average(x))) * x


class PeachyCBAM(nn.Module):
    """Peachypie98/CBAM: Linear layers with biases, the maximum first, CBAM(x) + x."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.cam, self.sam = PeachyChannel(channels, reduction), PeachySpatial()

    def forward(self, x: Tensor) -> Tensor:
        return self.sam(self.cam(x)) + x


class BraindecodeCBAM(nn.Module):
    """For series: [N, C, 1, T] and a kernel of one row."""

    def __init__(self, channels: int, reduction: int = 4, kernel_size: int = 9) -> None:
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        self.conv = nn.Conv2d(2, 1, (1, kernel_size), padding=(0, kernel_size // 2))

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.fc(average) + self.fc(maximum))
        return x * torch.sigmoid(self.conv(average_and_maximum(x)))


# -------------------------------------------------------------------- what only looks like a CBAM


class UltralyticsChannel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))


class UltralyticsSpatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.cv1(average_and_maximum(x)))


class UltralyticsCBAM(nn.Module):
    """One layer, and no pooling by maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_attention = UltralyticsChannel(channels)
        self.spatial_attention = UltralyticsSpatial()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial_attention(self.channel_attention(x))


class TwoMlpsCBAM(PeachyCBAM):
    """An MLP for each pooling."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__(channels, reduction)
        hidden = channels // reduction
        del self.cam.linear
        for name in ("linear_max", "linear_avg"):
            mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
            setattr(self.cam, name, mlp)
