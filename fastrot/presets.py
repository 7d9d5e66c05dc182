"""The papers' settings: functions that return a Config."""

import dataclasses
from collections.abc import Callable

from fastrot import config
from fastrot.config import Config, Schedule

PLAIN_SGD = config.Sgd(nesterov=False, weight_decay=1e-4, decay_norms=False)
TO_CONV5 = config.AlexNet(last="conv5")
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


def pirl_resnet50() -> Config:
    """PIRL with ResNet-50 on ImageNet, --method.transform rotation, jigsaw or both: 800 epochs, 256 pictures (Misra 2020)."""
    return Config(
        preset="pirl-resnet50",
        batch=256,
        method=config.Pirl(),
        backbone=config.Named(),
        optim=PLAIN_SGD,
        # the paper's .12 for 1024 pictures
        schedule=Schedule(kind="cosine", table=((800, 0.03),), epochs=800, last=0.001),
    )


def pirl_alexnet() -> Config:
    """The same with AlexNet up to conv5."""
    own = {"preset": "pirl-alexnet", "backbone": TO_CONV5}
    return dataclasses.replace(pirl_resnet50(), **own)


def pirl_nin_cifar10() -> Config:
    """PIRL with rotations and a 4-block NIN on CIFAR-10, a small setting of ours: 200 epochs, 128 pictures."""
    own = {"preset": "pirl-nin-cifar10", "batch": 128}
    return dataclasses.replace(
        rotnet_nin_cifar10(),
        **own,
        method=config.Pirl(
            crop=config.RandomResized(size=32, scale=(0.2, 1.0)),
            negatives=4096,
            augment=config.Augment(photometric=0.0),
        ),
        optim=PLAIN_SGD,
        schedule=Schedule(kind="cosine", table=((200, 0.03),), epochs=200),
    )


def npid_resnet50() -> Config:
    """NPID with ResNet-50 on ImageNet: 200 epochs, 256 pictures (Wu 2018)."""
    return Config(
        preset="npid-resnet50",
        batch=256,
        method=config.Pirl(
            crop=config.RandomResized(scale=(0.2, 1.0)),
            lambda_transform=0.0,
            negatives=4096,
            augment=config.Augment(hue=0.4, photometric=0.0),
        ),
        backbone=config.Named(),
        optim=dataclasses.replace(PLAIN_SGD, decay_norms=True),
        schedule=Schedule(table=((120, 0.03), (160, 0.003), (200, 3e-4)), epochs=200),
    )


def npid_alexnet() -> Config:
    """The same with AlexNet up to conv5."""
    own = {"preset": "npid-alexnet", "backbone": TO_CONV5}
    return dataclasses.replace(npid_resnet50(), **own)


def jigsaw_resnet50() -> Config:
    """Jigsaw of 2,000 orders with ResNet-50 on ImageNet: 105 epochs, 256 pictures (Goyal 2019)."""
    rates = ((30, 0.1), (60, 0.01), (90, 0.001), (100, 1e-4), (105, 1e-5))
    return Config(
        preset="jigsaw-resnet50",
        batch=256,
        method=config.Jigsaw(
            crop=config.Within(size=224, short=225),  # patches of 255 pixels of 256
            augment=config.Augment(
                brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, photometric=0.0, grey=0.66
            ),
        ),
        backbone=config.Named(),
        optim=PLAIN_SGD,
        schedule=Schedule(table=rates, epochs=105),
    )


def jigsaw_alexnet() -> Config:
    """The same with AlexNet up to conv5, at a tenth of the rate."""
    own = {"preset": "jigsaw-alexnet", "backbone": TO_CONV5}
    return dataclasses.replace(jigsaw_resnet50(), **own, lr=0.01)


def finetune() -> Config:
    """All of another run's network on labels, such as --rows 1% or 10% of them: 20 epochs, 256 pictures (after Misra 2020)."""
    return Config(
        preset="finetune",
        batch=256,
        method=config.Probe(crop=config.RandomResized(), stages=("last",), tune=True),
        optim=PLAIN_SGD,
        schedule=Schedule(table=((12, 0.01), (16, 0.001), (20, 1e-4)), epochs=20),
    )


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
    finetune,
    pirl_resnet50,
    pirl_alexnet,
    pirl_nin_cifar10,
    npid_resnet50,
    npid_alexnet,
    jigsaw_resnet50,
    jigsaw_alexnet,
    rotnet_resnet50,
    rotnet_six_layer,
    rotnet_mobilenet_v2,
    rotnet_efficientnet_b0,
    demo,
)
PRESETS: dict[str, Callable[[], Config]] = {make().preset: make for make in MAKERS}
