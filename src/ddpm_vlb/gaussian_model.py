r"""A Gaussian model of the data: its covariance, its terms of the bound, and the error of its best denoiser.

With eigenvalues lam_i of the data's covariance, z_i and e_i the coefficients of x_0 - mean and of epsilon in its
eigenvectors, and a = alphabar_t:

1. L_t = (SNR_{t-1} - SNR_t) / 2 x mean_i lam_i (1 - a) / (a lam_i + 1 - a), nats per dimension
2. the linear (Wiener) denoiser's gain k_i = sqrt(a) lam_i / (a lam_i + 1 - a)
3. its squared error |x_0 - x_0_hat|^2 = sum_i ((1 - k_i sqrt(a)) z_i - k_i sqrt(1 - a) e_i)^2
4. the expectation of (3) over epsilon = sum_i (1 - k_i sqrt(a))^2 z_i^2 + k_i^2 (1 - a)

(4) is exact for any x_0, whatever the data's distribution.

Sources: Kingma et al. 2021 (VDM), eq. 13; Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation",
eq. 23 (OAS).
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_GROUPS = 64  # distinct eigenvalues of the denoiser; more would cost memory (T x groups) and gain nothing


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """Mean and covariance of data, the latter in its eigenvectors or, for many dimensions, in a Fourier basis.

    Args:
        mean: of the data, (C, *), float64.
        eigenvalues: of the covariance, (D,), float64, not negative.
        basis: eigenvectors in columns, (D, D); or, for the stationary model, those of the channels' cross-covariance
            at each frequency, complex (D / C, C, C).

    Source: the module's list.
    """

    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, x_0: Tensor, max_dims: int = 2048) -> "GaussianModel":
        """Fit to data.

        Up to `max_dims` dimensions the covariance is the sample's; above, that of a stationary model: the power
        spectrum of the channels' cross-covariance, which a few hundred images give for any size.

        Args:
            x_0: data (N, C, *), at least 2 examples; a few hundred to a few thousand are enough.
            max_dims: largest D = C x H x W for which the full covariance is used.

        Raises:
            ValueError: fewer than 2 examples, or values that are not finite.
        """
        if len(x_0) < 2 or not bool(x_0.isfinite().all()):
            raise ValueError(f"`x_0` must hold at least 2 finite examples, but got {len(x_0)}.")
        x_0 = x_0.detach().cpu().double()
        mean = x_0.mean(0)
        centred = x_0 - mean
        if mean.numel() <= max_dims:
            flat = centred.flatten(1)
            eigenvalues, basis = torch.linalg.eigh(flat.T @ flat / (len(flat) - 1))
        else:
            spectrum = _spectrum(centred)
            cross = torch.einsum("nkc,nkd->kcd", spectrum, spectrum.conj()) / (len(centred) - 1)
            eigenvalues, basis = torch.linalg.eigh(cross)
        return cls(mean, eigenvalues.clamp(min=0).flatten(), basis)

    @property
    def stationary(self) -> bool:
        """Whether the basis is Fourier's."""
        return self.basis.is_complex()

    @functools.cached_property
    def _half(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the half of a real spectrum that is no mirror image: frequencies, their counts, basis (C, C, H)."""
        *others, last = self.mean.shape[1:] or (1,)
        every = torch.arange(math.prod(others) * last).reshape(*others, last)
        counts = torch.full((*others, last // 2 + 1), 2.0, dtype=torch.float64)
        counts[..., 0] = 1
        if last % 2 == 0:
            counts[..., -1] = 1
        index, counts = every[..., : last // 2 + 1].flatten(), counts.flatten()
        basis = self.basis[index].conj() * counts.sqrt()[:, None, None]
        return index, counts, basis.permute(1, 2, 0).resolve_conj().contiguous()

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients in the basis, float64 (B, D); for the stationary model (B, E), real and imaginary parts.

        Inner products of images are those of their coefficients.

        Args:
            x: data less the mean, or noise, (B, C, *).
        """
        x = x.detach().cpu().double()
        if not self.stationary:
            return x.flatten(1) @ self.basis
        x = x if x.ndim > 2 else x[..., None]
        spectrum = torch.fft.rfftn(x, dim=tuple(range(2, x.ndim)), norm="ortho").flatten(2)
        basis = self._half[2]
        rotated = spectrum[:, :1] * basis[0]
        for channel in range(1, len(basis)):  # faster than a matrix product at each frequency
            rotated.addcmul_(spectrum[:, channel, None], basis[channel])
        return torch.view_as_real(rotated).flatten(1)

    def shrunk(self, num_examples: int) -> "GaussianModel":
        """The model with its eigenvalues drawn towards their mean, as far as so few examples ask for (OAS).

        A sample covariance takes the directions that its few examples leave out for constant; a denoiser that believes
        it fails on the next image.

        Args:
            num_examples: N, how many the model was fitted to.
        """
        dims, trace, square = len(self.eigenvalues), self.eigenvalues.sum(), self.eigenvalues.square().sum()
        numerator = (1 - 2 / dims) * square + trace.square()
        denominator = (num_examples + 1 - 2 / dims) * (square - trace.square() / dims)
        share = (numerator / denominator).clamp(max=1) if denominator > 0 else torch.ones_like(trace)
        return replace(self, eigenvalues=torch.lerp(self.eigenvalues, trace / dims, share))

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues rounded to at most `NUM_GROUPS` values (G,), each coefficient's group, each group's dimensions.

        With rounded eigenvalues the denoiser is still linear, so that equation 4 stays exact.
        """
        eigenvalues, counts = self.eigenvalues, torch.ones_like(self.eigenvalues)
        if self.stationary:
            index, often, _ = self._half
            eigenvalues = eigenvalues.reshape(-1, self.basis.shape[-1])[index].T.flatten()
            counts = often.repeat(self.basis.shape[-1])
        largest = float(eigenvalues.max())
        floor = max(largest * 1e-6, 1e-30)
        position = (eigenvalues / floor).clamp(min=1).log() / math.log(1e6) * (NUM_GROUPS - 1)
        _, group = torch.unique(position.round().long(), return_inverse=True)
        dims = counts.new_zeros(int(group.max()) + 1).index_add_(0, group, counts)
        values = torch.zeros_like(dims).index_add_(0, group, eigenvalues * counts) / dims
        return values, group.repeat_interleave(2) if self.stationary else group, dims


def _spectrum(x: Tensor) -> Tensor:
    """The orthonormal Fourier transform over all positions, complex (B, D / C, C)."""
    x = x if x.ndim > 2 else x[..., None]
    return torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho").flatten(2).movedim(1, 2)


def covariance_eigenvalues(x_0: Tensor, max_dims: int = 2048) -> Tensor:
    """Eigenvalues of the covariance of the data, float64 (D,), for the Gaussian data model.

    Args:
        x_0: training data (N, C, *), at least 2 examples; a few hundred to a few thousand are enough.
        max_dims: as in `GaussianModel.fit`.

    Raises:
        ValueError: fewer than 2 examples, or values that are not finite.
    """
    return GaussianModel.fit(x_0, max_dims).eigenvalues


def gaussian_model_terms(alphas_cumprod: Tensor, eigenvalues: Tensor, decoder_by_snr: bool = False) -> Tensor:
    """L_t of Gaussian data with the best possible network, nats per dimension, float64 (T,); t = 0 copies t = 1.

    Args:
        alphas_cumprod: alphabar_t of the chain, (T,).
        eigenvalues: eigenvalues of the data's covariance, (D,), not negative.
        decoder_by_snr: give t = 0 SNR_0 mmse_0 / 2 instead, as on levels so close that the copy says nothing of all
            that lies below the first one, those of a path even in log SNR for example.

    Source: Kingma et al. 2021, eq. 13, with the minimum mean squared error of Gaussian data.
    """
    abar = alphas_cumprod.detach().cpu().double()[:, None]
    noise = 1 - abar
    lam = eigenvalues.detach().cpu().double()
    mmse = (lam * noise / (abar * lam + noise)).mean(1)
    snr = (abar / noise).squeeze(1)
    terms = 0.5 * (snr[:-1] - snr[1:]) * mmse[1:]
    if len(terms) == 0:
        return mmse
    return torch.cat([0.5 * snr[:1] * mmse[:1] if decoder_by_snr else terms[:1], terms])
