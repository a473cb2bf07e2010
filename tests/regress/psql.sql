-- psql itself: variables, \gset, \gexec, \gdesc, \crosstabview, \watch, formats, \if, LISTEN/NOTIFY.
\set who 'world'
SELECT 'hello ' || :'who' AS greeting, 1 AS n \gset
\echo :greeting :n
SELECT :n + 1 AS sum, :'greeting' AS text;
SELECT 1 AS x, 2 AS y \gset pre_
\echo :pre_x :pre_y
SELECT 1 WHERE false \gset
SELECT generate_series(1, 2) \gset
SELECT format('SELECT %s AS %I', i, 'col' || i) FROM generate_series(1, 3) AS i \gexec
SELECT 'SELECT nothing' UNION ALL SELECT 'SELECT 4' \gexec
SELECT 1 AS a, 'x'::varchar(5) AS b, NULL::numeric(5, 2) AS c, ARRAY[1] AS d \gdesc
SELECT nothing \gdesc
SELECT (i - 1) / 3 AS r, (i - 1) % 3 AS c, i AS v FROM generate_series(1, 9) AS i \crosstabview
SELECT i AS "one column" FROM generate_series(1, 3) AS i \gx
SELECT 'to a file' \g out.txt
\! cat out.txt
SELECT 'piped' \g | cat
\pset format unaligned
SELECT 1 AS a, 'b|c' AS b;
\pset format csv
SELECT 1 AS a, 'b,"c' AS b;
\pset format html
SELECT '<b>' AS a;
\pset format aligned
\pset border 2
\pset null '(null)'
SELECT NULL AS n, 'line
break' AS l;
\x on
SELECT 1 AS a, 'two' AS b;
\x off
\t on
SELECT 'tuples only';
\t off
\pset border 1
\pset title 'A title'
SELECT 1;
\pset title
\if true
SELECT 'taken';
\elif true
SELECT 'not taken';
\else
SELECT 'nor this';
\endif
\if :{?nothing}
SELECT 'defined';
\else
SELECT 'undefined';
\endif
SELECT :nothing;
SELECT :'who', :"who";
\set sql 'SELECT 42 AS answer;'
:sql
\echo :ROW_COUNT :SQLSTATE
SELECT 1/0;
\echo :ERROR :SQLSTATE :LAST_ERROR_MESSAGE
SELECT current_database() = :'DBNAME', :'USER' = current_user, :'ENCODING';
LISTEN channel;
NOTIFY channel, 'a payload';
NOTIFY channel;
SELECT pg_notify('channel', 'ünïcode'), pg_notify('other', 'unheard');
BEGIN;
NOTIFY channel, 'same';
NOTIFY channel, 'same';
NOTIFY channel, 'different';
SELECT 'not yet';
COMMIT;
SELECT pg_listening_channels();
UNLISTEN channel;
NOTIFY channel, 'gone';
UNLISTEN *;
SELECT pg_notify('', 'x');
SELECT pg_notify('c', repeat('x', 8000));
SELECT 1 AS a \; SELECT 2 AS b \; SELECT 3 AS c \gset
\echo :a :b :c
SELECT 1 AS first \; SELECT 2 AS second;
\bind 1 two
SELECT $1, $2 \g
SELECT $1::int + 1 AS bound \bind 41 \g
SELECT $1 AS p \parse named
\bind_named named x \g
\startpipeline
SELECT 1 AS piped \bind \g
\endpipeline
\conninfo
\encoding
\dx
\du nobody_at_all
\d nothing
\l nothing
\dT+ nothing
\di nothing
\sf nothing
\copyright
\lo_import no_such_file
SELECT lo_create(424242);
SELECT lo_from_bytea(424243, '\x0102'), lo_get(424243), lo_put(424243, 1, '\xff'), lo_get(424243);
\lo_export 424243 lo.bin
\lo_unlink 424243
\lo_unlink 424243
SELECT lo_unlink(424242);
\timing on
SELECT 'timed';
\timing off
\i no_such_file.sql
\nonsense
\warn to stderr
\qecho to stdout
\prompt
\unset who
\echo :who
\q
SELECT 'never reached';
