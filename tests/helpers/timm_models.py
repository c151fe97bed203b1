"""Import timm, which imports torchvision, and name a small model of each of its families."""

import vision  # noqa: F401 - torchvision

__all__ = ["MODELS", "timm"]

import timm

# The smallest model of each family, so that every kind of norm and activation occurs, with the
# smallest images that the model takes.
MODELS = {
    "resnet18": {},
    "resnet26d": {},
    "resnext26ts": {},
    "resnetv2_50": {},
    "regnetx_002": {},
    "regnety_002": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "efficientnet_lite0": {},
    "mnasnet_050": {},
    "densenet121": {},
    "dla34": {},
    "vgg11_bn": {},
    "inception_v3": {"side": 96},
    "ghostnet_050": {},
    "hrnet_w18_small": {},
    "cspresnet50": {},
    "darknet53": {},
    "rexnet_100": {},
    "tinynet_e": {},
    "repvgg_a0": {},
    "lcnet_050": {},
    "semnasnet_075": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "mixer_s32_224": {"side": 224},
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
}
