"""worldenv: post-train policies inside a learned world and prove the gain in the real benchmark.

Importing this package stays cheap: it loads neither torch nor the extension. Start reading at
`worldenv.stages`.
"""

__version__ = "0.1.0"
