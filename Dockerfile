# Pinned by digest (of the multi-architecture index), so that a build uses the image that was
# reviewed. Update it together with the tag. The same applies to requirements.lock.
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY protocol protocol
COPY proxy proxy
RUN pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements.lock \
    && pip install --no-cache-dir --no-deps --no-build-isolation '.[admin]' \
    && pip uninstall --yes setuptools \
    && rm -rf /src \
    && groupadd --gid 6543 pgbg \
    && useradd --uid 6543 --gid 6543 --no-create-home --shell /usr/sbin/nologin pgbg

# The proxy writes nothing, so the root file system may be read-only. The user is a number, because
# otherwise Kubernetes cannot tell that it is not root.
WORKDIR /
USER 6543:6543
EXPOSE 6543 6544
ENTRYPOINT ["pg-background-proxy"]
CMD ["serve", "--listen", "*:6543"]
