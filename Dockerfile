FROM python:3.13-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY proxy proxy
RUN pip install --no-cache-dir . \
    && rm -rf /src \
    && useradd --system --uid 6543 --no-create-home --shell /usr/sbin/nologin pgbg

WORKDIR /
USER pgbg
EXPOSE 6543
ENTRYPOINT ["pg-background-proxy"]
CMD ["serve", "--listen", "*:6543"]
