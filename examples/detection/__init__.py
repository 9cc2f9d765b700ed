"""Find squares, discs and triangles with a torchvision detector on generated images; measured by mAP."""
