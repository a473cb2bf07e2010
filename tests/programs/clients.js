// node-postgres: prints what it sees of ordinary traffic, or (argument: jobs) of jobs.
const { Client, Pool } = require("pg");
const Cursor = require("pg-cursor");
const say = (...values) => console.log(JSON.stringify(values));
const options = {
    host: process.env.PGHOST, port: +process.env.PGPORT, user: "postgres",
    database: process.env.PGDATABASE, ssl: false, connectionTimeoutMillis: 10000,
};

const known = (error) => {
    const { severity, code, message, detail, hint, position, file, line, routine } = error;
    return { severity, code, message, detail, hint, position, file, line, routine };
};
const failure = (promise) => promise.then(() => "no failure", known);

async function traffic(client) {
    client.on("notice", (notice) => say("notice", known(notice)));
    say((await client.query("SELECT 1 AS a, 'x' AS b, NULL AS c, 1.5::numeric, '{1,2}'::int[]," +
        " '\\x00ff'::bytea, '{\"a\": 1}'::jsonb, '2001-02-03Z'::timestamptz")).rows);
    say((await client.query("SELECT 1; SELECT 2 AS b")).map((result) => result.rows));
    say((await client.query("SELECT $1::int + 1 AS n, $2::text", [41, "ä"])).rows);
    say((await client.query({ text: "SELECT $1::jsonb AS j", values: [{ a: [1] }], rowMode: "array" })).rows);
    for (let turn = 0; turn < 8; turn++) {
        const query = { name: "named", text: "SELECT $1::int AS turn", values: [turn] };
        say((await client.query(query)).rows);
        say((await client.query({ text: "SELECT $1::int8 AS b", values: [turn], binary: true })).rows);
    }
    say(await Promise.all([1, 2, 3].map((n) => client.query("SELECT $1::int", [n]).then((r) => r.rows))));
    say(await failure(client.query("SELECT none")));
    say(await failure(client.query("SELECT $1::int", ["x"])));
    say(await failure(client.query("SELECT pg_background_none($1)", ["x"])));
    await client.query("DO $$ BEGIN RAISE NOTICE 'n' USING HINT = 'h'; END $$");
    await client.query("CREATE TABLE t (a int PRIMARY KEY, b text)");
    await client.query("BEGIN");
    await client.query("INSERT INTO t SELECT i, repeat('x', i) FROM generate_series(1, 2000) i");
    say(await failure(client.query("INSERT INTO t VALUES ($1)", [1])));
    say(await failure(client.query("SELECT 1")));
    await client.query("ROLLBACK");
    await client.query("INSERT INTO t SELECT i, repeat('x', i) FROM generate_series(1, 2000) i");
    const cursor = client.query(new Cursor("SELECT * FROM t WHERE a > $1 ORDER BY a", [10]));
    for (const count of [1, 100, 5000, 1])
        say((await cursor.read(count)).length);
    await cursor.close();
    const left = client.query(new Cursor("SELECT * FROM t", []));
    say((await left.read(3)).length);
    await left.close();
    await client.query("LISTEN c");
    const heard = new Promise((resolve) => client.on("notification", resolve));
    await client.query("NOTIFY c, 'pg_background_launch(1)'");
    const { channel, payload } = await heard;
    say(channel, payload);
    say(await failure(client.query("SET statement_timeout = 100; SELECT pg_sleep(20)")));
    await client.query("RESET statement_timeout");
    const pool = new Pool({ ...options, max: 3 });
    say(await Promise.all([...Array(30).keys()].map(
        (n) => pool.query("SELECT $1::int * 2 AS n", [n]).then((result) => result.rows[0].n))));
    await pool.end();
}

async function jobs(client) {
    for (let turn = 0; turn < 8; turn++) {
        const launch = { name: "launch", text: "SELECT pg_background_launch($1) AS pid" };
        const { pid } = (await client.query({ ...launch, values: [`SELECT ${turn} AS n, 'x' AS t`] })).rows[0];
        const query = turn % 2
            ? { name: "fetch", text: "SELECT * FROM pg_background_result($1) AS (n int, t text)", values: [pid] }
            : `SELECT * FROM pg_background_result(${pid})`;
        say((await client.query(query)).rows);
    }
    const launched = await Promise.all([1, 2, 3].map((n) =>
        client.query("SELECT pg_background_launch($1) AS pid", [`SELECT ${n} AS n`])));
    for (const { rows: [{ pid }] } of launched)
        say((await client.query("SELECT n FROM pg_background_result($1) AS (n int)", [pid])).rows);
    const { pid } = (await client.query(
        "SELECT pg_background_launch('SELECT generate_series(1, 1000)') AS pid")).rows[0];
    const cursor = client.query(new Cursor("SELECT * FROM pg_background_result($1) AS (n int)", [pid]));
    say((await cursor.read(10)).length, (await cursor.read(5000)).length);
    await cursor.close();
    const failing = (await client.query("SELECT pg_background_launch('SELECT 1/0') AS pid")).rows[0].pid;
    say((await failure(client.query("SELECT pg_background_result($1)", [failing]))).message);
    const detached = (await client.query("SELECT pg_background_launch('SELECT 1') AS pid")).rows[0].pid;
    say((await client.query("SELECT pg_background_detach($1)", [detached])).rowCount);
}

(async () => {
    const client = new Client(options);
    await client.connect();
    await (process.argv[2] === "jobs" ? jobs : traffic)(client);
    await client.end();
})().catch((error) => { console.error(error); process.exit(1); });
