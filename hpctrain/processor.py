"""What processor this is."""

import platform


def about(field: str) -> str:
    """Give what Linux tells of the first core under a name ("model name"), else "". Local."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = (line.split(":", 1)[1].strip() for line in file if line.startswith(field))
            return next(found, "")
    except OSError:
        return ""


def processor() -> str:
    """Name this processor and the vector instructions that torch uses on it. Local."""
    import torch  # late: threads are set before torch starts

    return f"{about('model name') or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
