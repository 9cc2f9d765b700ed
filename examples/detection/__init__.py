"""Where are the squares, discs and triangles? A torchvision detector on generated images, measured by mAP."""
