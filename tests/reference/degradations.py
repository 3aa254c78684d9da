"""Degradations the slow way: scipy and Pillow on one image (3, h, w) in float64."""

import io

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn, idctn


def gaussian_noise(image, noise, std):
    return np.clip(image + std * noise, 0, 1)


def gaussian_blur(image, sigma):
    return np.stack([ndimage.gaussian_filter(channel, sigma, mode="nearest", truncate=4) for channel in image])


def motion_blur(image, length, angle):
    """The mean of the image moved along a line: points at most a tenth of a pixel apart, bilinear between pixels."""
    steps = int(np.ceil(10 * length)) + 1
    moved = []
    for t in np.linspace(-length / 2, length / 2, steps):
        shift = (t * np.sin(angle), t * np.cos(angle))
        moved.append(np.stack([ndimage.shift(channel, shift, order=1, mode="nearest") for channel in image]))
    return sum(moved) / steps


def jpeg_file(image, quality):
    """Written and read by Pillow; (h, w, 3) uint8 in and out."""
    Image.fromarray(image).save(file := io.BytesIO(), "jpeg", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file)), Image.open(file).quantization


def jpeg_of_grey(grey, table):
    """What a codec does to a grey image (h, w) of 0 to 255, sides of whole blocks: 8 x 8 DCT, rounded to the table."""
    result = np.empty(grey.shape)
    for row in range(0, grey.shape[0], 8):
        for column in range(0, grey.shape[1], 8):
            coefficients = dctn(grey[row : row + 8, column : column + 8] - 128.0, norm="ortho")
            kept = np.round(coefficients / table) * table
            result[row : row + 8, column : column + 8] = np.round(idctn(kept, norm="ortho") + 128)
    return np.clip(result, 0, 255)


def contrast(image, factor):
    mean = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]).mean()
    return np.clip(mean + factor * (image - mean), 0, 1)


def downscale(image, fraction):
    height, width = image.shape[1:]
    small = (max(1, round(fraction * width)), max(1, round(fraction * height)))
    channels = []
    for channel in image:
        one = Image.fromarray(channel.astype(np.float32)).resize(small, Image.Resampling.BILINEAR)
        channels.append(np.asarray(one.resize((width, height), Image.Resampling.BILINEAR), np.float64))
    return np.stack(channels)
