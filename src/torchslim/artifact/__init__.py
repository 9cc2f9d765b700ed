"""What is saved, deployed and measured."""
