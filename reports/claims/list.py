"""All claims, as data, by topic; a new one is one entry in ``reports/claims/lists``.

Sources name what the claim was made in; "none on file" means that it is often said, or asked in this project, and that
no publication is cited for it here.
"""

from reports.claims.lists import channels, corpora, frontier, headline, merging, needing
from reports.claims.lists.words import MEASURES

CLAIMS = (
    *headline.CLAIMS, *merging.CLAIMS, *corpora.CLAIMS, *channels.CLAIMS, *frontier.CLAIMS, *needing.CLAIMS,
)  # fmt: skip

__all__ = ["CLAIMS", "MEASURES"]
