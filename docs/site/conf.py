# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The documentation site: the pages of `docs/` and the API from the docstrings. `make docs` builds it."""

import re
import sys
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]

project = "evolmm-trl"
author = "The evolmm-trl authors"
copyright = author
extensions = ["myst_parser", "api_directive", "mathml"]
exclude_patterns = ["site"]
nitpicky = True  # a reference to what is not documented is an error

# The Markdown is that of GitHub
myst_enable_extensions = ["deflist", "dollarmath"]
myst_fence_as_directive = {"math"}
myst_heading_anchors = 4
myst_dmath_allow_labels = False
myst_dmath_double_inline = True

html_theme = "furo"
html_title = "evolmm-trl"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
highlight_language = "none"  # of blocks that name no language
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _name_files_of_the_repository(app, page: str, source: list[str]) -> None:
    """Links to files that are no pages: GitHub shows them, the site names them."""
    source[0] = re.sub(r"\[([^]]+)\]\((?:\.\./)+([^)]+)\)", _name, source[0])


def _name(link: re.Match) -> str:
    text, path = link.groups()
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"


def setup(app) -> None:
    app.connect("source-read", _name_files_of_the_repository)
