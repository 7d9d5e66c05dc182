"""The papers' settings: functions that return a Config."""

from collections.abc import Callable

from fastrot import config
from fastrot.config import Config, Schedule


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


MAKERS = (rotnet_alexnet, rotnet_nin_cifar10, decoupling_alexnet, supervised_alexnet, demo)
PRESETS: dict[str, Callable[[], Config]] = {make().preset: make for make in MAKERS}
