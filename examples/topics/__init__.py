"""What a news article is about: long texts of any length through a convolution over words."""
