"""What figures are held against: what the original took of its users, and what this project wants to reach.

The only figures on a page that are no row's. Each names its source.
"""

IMAGENET, VALIDATION = 1_281_167, 50_000  # pictures of ILSVRC 2012: training, validation
PRESET = "decoupling-alexnet"  # whose epoch it is about

REFERENCE_HOURS = 8  # an epoch of the original's code
REFERENCE_IMAGES_PER_S = 46  # the pictures of both sets over those hours
REFERENCE = (
    f"the original's code took {REFERENCE_HOURS} hours an epoch, {REFERENCE_IMAGES_PER_S} images/s, by a user's log of a "
    f"run over ImageNet on one GPU of 32 GB: {IMAGENET:,} pictures to train on and {VALIDATION:,} to validate"
)

EPOCH_S = 60  # on one H200, its validation included
VERY_GOOD_S, GOOD_S = 90, 120
WAITED = 0.02  # share of a step's time that it may wait for data, on one H200
AIMS = (
    f"the project's own targets for one H200: an epoch in {EPOCH_S} s end to end ({VERY_GOOD_S} s is very good, {GOOD_S} s "
    f"good), and less than {WAITED:.0%} of a step spent waiting for data"
)
