"""The networks that the notebooks train; volumes and images have their channels last.

Only those that normalise over the batch, ResNet-50 and MobileNetV2, use the other samples of a batch; with the others
P ranks of batch B can equal one rank of P x B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nurion_utils._checks import one_of

if TYPE_CHECKING:
    import keras

COSMOFLOW_WEIGHTS = 7_041_443  # that train, for 3 outputs, as the authors' code counts them


def cosmoflow(outputs: int = 3) -> keras.Model:
    """The CosmoFlow network at full size: volumes of 128^3, 7 convolutions, 3 dense layers; predicts `outputs` numbers.

    After the authors' code (github.com/NERSC/cosmoflow, CosmoNet.py, which goes with Mathuriya et al. 2018,
    arXiv 1808.04728). It counts `COSMOFLOW_WEIGHTS` for 3 outputs, and a log of its runs 7,041,186 for 2; this network
    has exactly as many. As float32 gradients they are 28.17 MB; the paper's figure is remembered as 28.15 MB.

    Inferred: the code declares a third pooling whose result it never uses. A row of 2048 values, as the first dense
    layer expects, comes out if it follows the fourth convolution; so it does here. The slope of the leaky ReLU, a
    setting there, is 0.2 here, and the dropout is left out.
    """
    import keras
    from keras import layers

    bias = {"bias_initializer": keras.initializers.Constant(0.1)}

    def convolution(channels: int, width: int, strides: int = 1) -> list[keras.Layer]:
        return [layers.Conv3D(channels, width, strides=strides, **bias), layers.LeakyReLU(0.2)]

    def dense(width: int) -> list[keras.Layer]:
        return [layers.Dense(width, **bias), layers.LeakyReLU(0.2)]

    return keras.Sequential(
        [
            layers.Input((128, 128, 128, 1)),
            *convolution(16, 3),
            layers.AveragePooling3D(2),
            *convolution(32, 4),
            layers.AveragePooling3D(2),
            *convolution(64, 4, strides=2),
            *convolution(128, 3),
            layers.AveragePooling3D(2),
            *convolution(256, 3),
            *convolution(256, 2),
            *convolution(256, 2),
            layers.Flatten(),
            *dense(2048),
            *dense(256),
            layers.Dense(outputs, **bias),
        ],
        name="cosmoflow",
    )


def cosmoflow_small(size: int, outputs: int = 3) -> keras.Model:
    """CosmoFlow's small sister: the same kinds of layers, as many as bring ``size``^3 voxels down to 4^3.

    `size` is 8, 16, 32, 64 or 128. It has 1.45 million parameters at 64^3, 0.36 million at 32^3 and 0.09 million at
    16^3. Unlike its sister it averages over the volume before the dense layers: the universe is alike everywhere, and
    from a few hundred volumes a network that is not told so learns them by heart.
    """
    one_of(size, "size", (8, 16, 32, 64, 128))
    import keras
    from keras import layers

    def convolution(width: int) -> list[keras.Layer]:
        return [layers.Conv3D(channels, width, padding="same"), layers.LeakyReLU(0.2)]

    network = [layers.Input((size, size, size, 1))]
    channels = 16
    while size > 4:
        network += [*convolution(3), layers.AveragePooling3D(2)]
        size, channels = size // 2, channels * 2
    network += convolution(3)
    channels //= 2
    network += [*convolution(2), layers.GlobalAveragePooling3D()]
    network += [layers.Dense(64), layers.LeakyReLU(0.2), layers.Dense(outputs)]
    return keras.Sequential(network, name="cosmoflow_small")


def mlp(widths: tuple[int, ...] = (64, 128, 128, 10)) -> keras.Model:
    """A perceptron of these widths, input first; the outputs are logits. The default reads scikit-learn's digits."""
    import keras
    from keras import layers

    hidden = [layers.Dense(width, "relu") for width in widths[1:-1]]
    return keras.Sequential([layers.Input(widths[:1]), *hidden, layers.Dense(widths[-1])], name="mlp")


def resnet50(size: int = 224) -> keras.Model:
    """ResNet-50 for ImageNet's 1000 classes as Keras ships it, untrained, for images of ``size`` x ``size`` x 3."""
    import keras

    return keras.applications.ResNet50(weights=None, input_shape=(size, size, 3))


def mobilenet(size: int = 32) -> keras.Model:
    """MobileNetV2 (Sandler et al., 2018) of 0.35 of its width, untrained, for ten classes of ``size`` x ``size`` x 3.

    Its 0.4 million weights lie in 158 tensors, nine tenths of them shorter than 4096 numbers.
    """
    import keras

    return keras.applications.MobileNetV2((size, size, 3), alpha=0.35, weights=None, classes=10)
