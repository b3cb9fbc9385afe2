"""From a Request to pictures: options, prompt writing, the one sampling loop, and shared forwards."""
