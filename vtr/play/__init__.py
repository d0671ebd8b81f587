"""The playground, ``vtr play``: one picture, one question, several policies side by side, in a browser.

``knobs`` makes sliders of policies' settings, ``snippets`` what can be copied, ``ask`` runs policies and streams what
they say, ``shown`` makes tables and pictures of it. ``page`` lays it out and ``handlers`` answers it, with Gradio
(extra ``play``), which nothing else imports.
"""
