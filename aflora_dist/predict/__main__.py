"""`accelerate launch -m aflora_dist.predict RUN FILE`: several ranks label a file together."""

from ..leaving import leave
from .command import main

if __name__ == "__main__":
    leave(main())
