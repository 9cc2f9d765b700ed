"""Which pixels show which shape: a small U-Net on generated images, measured by mean IoU."""
