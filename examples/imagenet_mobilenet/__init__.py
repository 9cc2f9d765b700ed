"""MobileNetV2 of ImageNet without ImageNet: int8 must answer as the float model does, on crops of photographs."""
