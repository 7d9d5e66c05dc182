"""The papers' settings: functions that return a Config."""

import dataclasses
from collections.abc import Callable

from fastrot import config
from fastrot.config import Config, Schedule

LINEAR = Schedule(table=((5, 0.01), (25, 0.002), (45, 4e-4), (65, 8e-5)), epochs=65)


def rotnet_alexnet() -> Config:
    """RotNet with AlexNet on ImageNet: 50 epochs, 192 pictures x 4 rotations (Gidaris 2018, released code)."""
    return Config(preset="rotnet-alexnet")


def rotnet_nin_cifar10() -> Config:
    """RotNet with a 4-block NIN on CIFAR-10: 200 epochs, 128 pictures x 4 rotations (Gidaris 2018)."""
    return Config(
        preset="rotnet-nin-cifar10",
        batch=128,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        method=config.RotNet(crop=config.Shifted()),
        backbone=config.Nin(),
        schedule=Schedule(table=((60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008)), epochs=200),
    )


def decoupling_alexnet() -> Config:
    """Rotation Feature Decoupling with AlexNet on ImageNet: 245 epochs, 192 pictures x 4 rotations (Feng 2019)."""
    # from 210 on with PU weights
    rates = ((90, 0.01), (130, 0.001), (190, 1e-4), (210, 1e-5), (230, 1e-4), (245, 1e-5))
    schedule = Schedule(table=rates, epochs=245)
    return Config(preset="decoupling-alexnet", method=config.Decoupling(), schedule=schedule)


def supervised_alexnet() -> Config:
    """AlexNet on labels, the yardstick: 90 epochs, 192 pictures (torchvision's reference length)."""
    return Config(
        preset="supervised-alexnet",
        method=config.Supervised(),
        schedule=Schedule(table=((30, 0.01), (60, 0.001), (90, 1e-4)), epochs=90),
    )


def probe_linear() -> Config:
    """Linear classifiers on conv1 ... conv5 of another run's AlexNet: 65 epochs, 192 pictures (Feng 2019)."""
    return Config(preset="probe-linear", method=config.Probe(), schedule=LINEAR)


def probe_linear_places205() -> Config:
    """The same on Places205, whose pictures are 256 pixels a side: 65 epochs, 192 pictures (Feng 2019)."""
    return Config(preset="probe-linear-places205", method=config.Probe(), schedule=LINEAR)


def probe_linear_rotnet() -> Config:
    """The same in the time that RotNet's own probes took: 35 epochs, 192 pictures (Gidaris 2018)."""
    schedule = Schedule(table=((5, 0.01), (15, 0.002), (25, 4e-4), (35, 8e-5)), epochs=35)
    return Config(preset="probe-linear-rotnet", method=config.Probe(), schedule=schedule)


def probe_nonlinear() -> Config:
    """All that follows conv4, and conv5, learnt anew on labels: 40 epochs, 192 pictures (Gidaris 2018, Feng 2019)."""
    return Config(
        preset="probe-nonlinear",
        method=config.Probe(head="nonlinear", stages=("conv4", "conv5")),
        schedule=Schedule(table=((10, 0.01), (20, 0.002), (30, 4e-4), (40, 8e-5)), epochs=40),
    )


def probe_mlp_cifar10() -> Config:
    """Three-layer classifiers on each block of another run's NIN: 100 epochs, 128 pictures (Gidaris 2018)."""
    stages = ("conv1", "conv2", "conv3", "conv4")
    method = config.Probe(crop=config.Shifted(), head="mlp", stages=stages)
    schedule = Schedule(table=((20, 0.1), (40, 0.02), (45, 0.004), (50, 8e-4)), epochs=100)
    own = {"preset": "probe-mlp-cifar10", "method": method, "schedule": schedule}
    return dataclasses.replace(rotnet_nin_cifar10(), **own)


def probe_conv_cifar10() -> Config:
    """A convolutional classifier on the second block of another run's NIN: 100 epochs, 128 pictures (Gidaris 2018)."""
    method = config.Probe(crop=config.Shifted(), head="conv", stages=("conv2",))
    schedule = Schedule(table=((35, 0.1), (70, 0.02), (85, 0.004), (100, 8e-4)), epochs=100)
    own = {"preset": "probe-conv-cifar10", "method": method, "schedule": schedule}
    return dataclasses.replace(rotnet_nin_cifar10(), **own)


def supervised_nin_cifar10() -> Config:
    """A 3-block NIN on CIFAR-10's labels, the yardstick: 200 epochs, 128 pictures (Gidaris 2018)."""
    own = {"preset": "supervised-nin-cifar10", "backbone": config.Nin(stages=3)}
    method = config.Supervised(crop=config.Shifted())
    return dataclasses.replace(rotnet_nin_cifar10(), **own, method=method)


def rotnet_resnet50() -> Config:
    """RotNet with ResNet-50, or any --backbone.name, on ImageNet: 50 epochs, 64 pictures x 4 rotations (after Gidaris 2018)."""
    return Config(preset="rotnet-resnet50", batch=64, backbone=config.Named())


def rotnet_six_layer() -> Config:
    """RotNet on faces, cats and dogs, or streets (LFW, COCO, Cityscapes), with six layers: 50 epochs, 64 pictures x 4 rotations.

    Whole pictures squashed to 128 pixels and RMSprop are the study's. Of its exponential decay it tells a step of 10 and no factor:
    here the rate falls evenly to a tenth over the run, whose length is ours too.
    """
    return Config(
        preset="rotnet-six-layer",
        batch=64,
        method=config.RotNet(crop=config.Whole(size=128)),
        backbone=config.Named(name="six-layer"),
        optim=config.RMSprop(),
        schedule=Schedule(kind="exponential", table=((50, 1e-4),), epochs=50, last=0.1),
    )


def rotnet_mobilenet_v2() -> Config:
    """The same with MobileNetV2."""
    own = {"preset": "rotnet-mobilenet-v2", "backbone": config.Named(name="mobilenet_v2")}
    return dataclasses.replace(rotnet_six_layer(), **own)


def rotnet_efficientnet_b0() -> Config:
    """The same with EfficientNet-B0."""
    own = {"preset": "rotnet-efficientnet-b0", "backbone": config.Named(name="efficientnet_b0")}
    return dataclasses.replace(rotnet_six_layer(), **own)


def demo() -> Config:
    """RotNet in a minute or two on a CPU: quarter-width AlexNet on 64-pixel crops, 1,120 steps of 32."""
    return Config(
        preset="demo",
        batch=32,
        method=config.RotNet(crop=config.RandomResized(size=64, scale=(0.3, 1.0))),
        backbone=config.AlexNet(width=0.25, kernel=5, stride=2),
        optim=config.Sgd(decay_norms=False),
        schedule=Schedule(kind="linear", table=((1, 0.03),), epochs=1, steps=1120),
        validate_every=20,
    )


MAKERS = (
    rotnet_alexnet,
    rotnet_nin_cifar10,
    decoupling_alexnet,
    supervised_alexnet,
    supervised_nin_cifar10,
    probe_linear,
    probe_linear_places205,
    probe_linear_rotnet,
    probe_nonlinear,
    probe_mlp_cifar10,
    probe_conv_cifar10,
    rotnet_resnet50,
    rotnet_six_layer,
    rotnet_mobilenet_v2,
    rotnet_efficientnet_b0,
    demo,
)
PRESETS: dict[str, Callable[[], Config]] = {make().preset: make for make in MAKERS}
