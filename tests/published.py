"""The published networks written straight, in the parameter names of their PyTorch files, and
random tensors by these names.

B batch · C channels · H,W grid; t: tensors by name, whose type is the arithmetic's; pictures are in
0..255"""

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]
BLOCKS, GROUP_BLOCKS = 2, 2
STEPS = {2: (2,), 3: (3,), 4: (2, 2)}


def conv(t: Tensors, name: str, x: Tensor) -> Tensor:
    weight = t[f"{name}.weight"]
    return F.conv2d(x, weight, t.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def enlarged(t: Tensors, x: Tensor, scale: int) -> Tensor:
    for n, step in enumerate(STEPS[scale]):
        x = F.pixel_shuffle(conv(t, f"tail.0.{2 * n}", x), step)
    return conv(t, "add_mean", conv(t, "tail.1", x))


def edsr(t: Tensors, x: Tensor, scale: int) -> Tensor:
    shallow = y = conv(t, "head.0", conv(t, "sub_mean", x))
    for n in range(BLOCKS):
        y = y + conv(t, f"body.{n}.body.2", conv(t, f"body.{n}.body.0", y).relu())
    return enlarged(t, shallow + conv(t, f"body.{BLOCKS}", y), scale)


def groups(t: Tensors, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The shallow features, and what comes out of every group and of the last convolution."""
    shallow = y = conv(t, "head.0", conv(t, "sub_mean", x))
    outputs = []
    for g in range(BLOCKS):
        before = y
        for n in range(GROUP_BLOCKS):
            part = f"body.{g}.body.{n}.body"
            z = conv(t, f"{part}.2", conv(t, f"{part}.0", y).relu())
            mean = z.mean((2, 3), keepdim=True)
            factor = conv(t, f"{part}.3.conv_du.0", mean).relu()
            y = y + z * conv(t, f"{part}.3.conv_du.2", factor).sigmoid()
        y = before + conv(t, f"body.{g}.body.{GROUP_BLOCKS}", y)
        outputs.append(y)
    return shallow, [*outputs, conv(t, f"body.{BLOCKS}", y)]


def rcan(t: Tensors, x: Tensor, scale: int) -> Tensor:
    shallow, outputs = groups(t, x)
    return enlarged(t, shallow + outputs[-1], scale)


def han(t: Tensors, x: Tensor, scale: int) -> Tensor:
    shallow, outputs = groups(t, x)
    layers = outputs[::-1]
    mixed = []
    for one in layers:
        agree = torch.stack([(one * other).sum((1, 2, 3)) for other in layers])
        share = torch.exp(agree.min(0).values - agree)
        share = (share / share.sum(0))[..., None, None, None]  # [N,B,1,1,1]
        mean = sum(s * other for s, other in zip(share, layers, strict=True))
        mixed.append(one + t["la.gamma"] * mean)
    among = conv(t, "last_conv", torch.cat(mixed, 1))
    deep = outputs[-1]
    around = F.pad(deep, (0, 0, 0, 0, 1, 1))  # a channel of zeros on either side
    logits = t["csa.conv.bias"]
    for d in range(3):
        plane = around[:, d : d + deep.shape[1]].flatten(0, 1)[:, None]
        plane = F.conv2d(plane, t["csa.conv.weight"][:, :, d], padding=1)
        logits = logits + plane.view_as(deep)
    spatial = deep * (1 + t["csa.gamma"] * logits.sigmoid())
    return enlarged(t, shallow + conv(t, "last", torch.cat([spatial, among], 1)), scale)


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def a2n(t: Tensors, x: Tensor, scale: int) -> Tensor:
    shallow = y = conv(t, "conv_first", x)
    for n in range(BLOCKS):
        part = f"AAB_trunk.{n}"
        z = leaky(conv(t, f"{part}.conv_first", y))
        inner = (z.mean((2, 3)) @ t[f"{part}.ADM.0.weight"].T).relu()
        first, second = (inner @ t[f"{part}.ADM.2.weight"].T).T[..., None, None, None]
        share = torch.sigmoid((first - second) / 30)
        around = leaky(conv(t, f"{part}.attention.k1", z))
        factor = conv(t, f"{part}.attention.k2", around)
        attended = conv(t, f"{part}.attention.k3", z) * factor.sigmoid()
        attended = conv(t, f"{part}.attention.k4", attended)
        z = share * attended + (1 - share) * conv(t, f"{part}.non_attention", z)
        y = y + conv(t, f"{part}.conv_last", leaky(z))
    z = shallow + conv(t, "trunk_conv", y)
    for n, step in enumerate(STEPS[scale], 1):
        z = z.repeat_interleave(step, 2).repeat_interleave(step, 3)
        z = conv(t, f"upconv{n}", z)
        z = leaky(z * conv(t, f"att{n}.conv", z).sigmoid())
        z = leaky(conv(t, f"HRconv{n}", z))
    size = [side * scale for side in x.shape[2:]]
    return conv(t, "conv_last", z) + F.interpolate(x, size, mode="bilinear", align_corners=False)


NETWORKS = {"edsr": edsr, "rcan": rcan, "han": han, "a2n": a2n, "a2n-m": a2n}


def shapes(kind: str, scale: int, width: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights of convolutions (four axes) and of linear layers (two);
    a convolution has a bias, but for the blocks of A2N."""
    found: dict[str, tuple[int, ...]] = {}
    if kind in ("a2n", "a2n-m"):
        found |= {"conv_first": (width, 3, 3, 3), "trunk_conv": (width, width, 3, 3)}
        for n in range(BLOCKS):
            sides = {"conv_first": 1, "conv_last": 1, "attention.k2": 1}
            sides |= {"attention.k1": 3, "attention.k3": 3, "attention.k4": 3}
            sides["non_attention"] = 3 if kind == "a2n" else 1
            found |= {f"AAB_trunk.{n}.{k}": (width, width, s, s) for k, s in sides.items()}
            found |= {f"AAB_trunk.{n}.ADM.0": (width // 4, width)}
            found |= {f"AAB_trunk.{n}.ADM.2": (2, width // 4)}
        for n in range(1, len(STEPS[scale]) + 1):
            found[f"upconv{n}"] = (24, width if n == 1 else 24, 3, 3)
            found |= {f"att{n}.conv": (24, 24, 1, 1), f"HRconv{n}": (24, 24, 3, 3)}
        return found | {"conv_last": (3, 24, 3, 3)}
    found |= {"head.0": (width, 3, 3, 3), f"body.{BLOCKS}": (width, width, 3, 3)}
    for n in range(BLOCKS):
        inner = [f"body.{n}"]
        if kind != "edsr":
            inner = [f"body.{n}.body.{m}" for m in range(GROUP_BLOCKS)]
            found[f"body.{n}.body.{GROUP_BLOCKS}"] = (width, width, 3, 3)
            found |= {f"{part}.body.3.conv_du.0": (width // 4, width, 1, 1) for part in inner}
            found |= {f"{part}.body.3.conv_du.2": (width, width // 4, 1, 1) for part in inner}
        found |= {f"{part}.body.{m}": (width, width, 3, 3) for part in inner for m in (0, 2)}
    for n, step in enumerate(STEPS[scale]):
        found[f"tail.0.{2 * n}"] = (width * step * step, width, 3, 3)
    if kind == "han":
        found |= {
            "last_conv": (width, width * (BLOCKS + 1), 3, 3),
            "last": (width, 2 * width, 3, 3),
        }
        found["csa.conv"] = (1, 1, 3, 3, 3)
    return found | {"tail.1": (3, width, 3, 3)}


def random_tensors(kind: str, scale: int, width: int) -> Tensors:
    """float32 tensors for pictures in 0..255, sized so that factors and HAN's shares of layers lie
    between their ends."""
    generator = torch.Generator().manual_seed(7)
    small = 1e-3 if kind == "han" else 1.0  # HAN's layers agree by their size, squared
    t: Tensors = {}
    for name, shape in shapes(kind, scale, width).items():
        weight = torch.randn(shape, generator=generator)
        weight /= weight[0].numel() ** 0.5
        factor = any(part in name for part in ("conv_du", "k2", "att1", "att2", "csa"))
        if factor or "ADM" in name:
            weight *= 1 if "conv_du.2" in name else 0.02 / small
        if name in ("head.0", "tail.1"):
            weight *= small if name == "head.0" else 1 / small
        t[f"{name}.weight"] = weight
        bare = name.startswith("AAB_trunk") and not name.endswith("k2")
        if not bare:
            size = 1.0 if factor else 30 * (1 if name == "tail.1" else small)
            t[f"{name}.bias"] = size * torch.randn(shape[:1], generator=generator)
    if kind in ("edsr", "rcan", "han"):
        for name, sign in (("sub_mean", -1), ("add_mean", 1)):
            t[f"{name}.weight"] = torch.eye(3).view(3, 3, 1, 1)
            t[f"{name}.bias"] = sign * 255 * torch.tensor([0.4690, 0.4490, 0.4036])
    if kind == "han":
        t |= {"la.gamma": torch.tensor([0.7]), "csa.gamma": torch.tensor([-1.3])}
    return t
