"""Image classification on ImageNet-1k, against DeiT; CIFAR, Fashion-MNIST and folders of pictures on the same path."""
