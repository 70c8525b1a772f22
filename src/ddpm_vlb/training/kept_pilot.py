"""The pilot of a run's validations."""

from torch import Tensor

from ddpm_vlb import Pilot


class KeptPilot:
    """Fitted at the first validation and kept in checkpoints, so that a resumed run scores as it would have."""

    def __init__(self) -> None:
        self.pilot: Pilot | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {} if self.pilot is None else self.pilot.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.pilot = Pilot.from_state_dict(state_dict) if state_dict else None
